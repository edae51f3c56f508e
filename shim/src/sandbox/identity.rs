//! Whether the guest is what it was asked to be, in its own words read back from its kernel.

use joey_protocol::api;
use joey_protocol::limits::RANDOM_BYTES;

/// What a guest says that is another than it was asked to be, or its template still.
pub(super) fn check(
    asked: &api::StartSandboxRequest,
    told: &api::StartSandboxResponse,
) -> Result<(), String> {
    if told.machine_id != asked.machine_id {
        let (told, asked) = (hex(&told.machine_id), hex(&asked.machine_id));
        return Err(format!("its machine id is {told:?}, not {asked:?}"));
    }
    if !asked.hostname.is_empty() && told.hostname != asked.hostname {
        return Err(format!("its host name is {:?}, not {:?}", told.hostname, asked.hostname));
    }
    if !is_random_uuid(&told.boot_id) {
        return Err(format!("its boot id is {:?}, which is no random UUID", told.boot_id));
    }
    for (what, random) in [("random", &told.random), ("former random", &told.former_random)] {
        if random.len() != RANDOM_BYTES {
            return Err(format!("it told {} {what} bytes, not {RANDOM_BYTES}", random.len()));
        }
    }
    if told.random == told.former_random || told.random.iter().all(|byte| *byte == told.random[0]) {
        return Err(format!("its random bytes are its template's: {}", hex(&told.random)));
    }
    Ok(())
}

/// `xxxxxxxx-xxxx-4xxx-xxxx-xxxxxxxxxxxx`
fn is_random_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            14 => byte == b'4',
            _ => byte.is_ascii_hexdigit(),
        })
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_is_not_what_was_asked_is_refused() {
        let asked = api::StartSandboxRequest {
            machine_id: vec![7; 16],
            hostname: "web-0".to_owned(),
            ..Default::default()
        };
        let told = api::StartSandboxResponse {
            machine_id: vec![7; 16],
            hostname: "web-0".to_owned(),
            boot_id: "0a3c1b52-9f10-4c3e-8a57-5e8c1f0b2d4e".to_owned(),
            random: (0..16).collect(),
            former_random: (1..17).collect(),
            ..Default::default()
        };
        check(&asked, &told).unwrap();
        type Fault = fn(&mut api::StartSandboxResponse);
        let faults: [(Fault, &str); 7] = [
            (|it| it.machine_id[3] = 0, "machine id"),
            (|it| it.machine_id.clear(), "machine id is \"\""),
            (|it| it.hostname = "(none)".to_owned(), "host name is \"(none)\", not \"web-0\""),
            (|it| it.boot_id.clear(), "boot id"),
            (|it| it.boot_id.replace_range(14..15, "0"), "boot id"),
            (|it| it.random.truncate(8), "8 random bytes"),
            (|it| it.random.clone_from(&it.former_random), "template"),
        ];
        for (fault, words) in faults {
            let mut told = told.clone();
            fault(&mut told);
            let error = check(&asked, &told).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
