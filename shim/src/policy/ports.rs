//! Protocols and ports as the node policy has them: `any`, `icmp`, `tcp`, `443/tcp`, `8000-8100/udp`.

use joey_ebpf::policy::abi::Ports;

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMP6: u8 = 58;

const WRONG: &str = "must be any, icmp, tcp, udp, or ports with a protocol: 443/tcp, 8000-8100/udp";

/// What a word allows.
pub(super) fn parse(text: &str) -> Result<Vec<Ports>, String> {
    match text {
        "any" => return Ok(vec![Ports::Any]),
        // Of both families: an address is of one, so nothing is confused.
        "icmp" => return Ok(vec![Ports::Protocol(ICMP), Ports::Protocol(ICMP6)]),
        "tcp" => return Ok(vec![Ports::Protocol(TCP)]),
        "udp" => return Ok(vec![Ports::Protocol(UDP)]),
        _ => {}
    }
    let (ports, proto) = text.split_once('/').ok_or(WRONG)?;
    let proto = match proto {
        "tcp" => TCP,
        "udp" => UDP,
        "sctp" => {
            return Err("SCTP passes no pod's wire: only tcp, udp and icmp can be allowed".into());
        }
        _ => return Err(WRONG.into()),
    };
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let (first, last) = (number(first)?, number(last)?);
    if first > last {
        return Err(format!("ends before it begins; {last}-{first} is a range"));
    }
    Ok(Ports::range(proto, first, last))
}

fn number(text: &str) -> Result<u16, String> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = digits.then(|| text.parse().ok()).flatten();
    number.filter(|number| *number != 0).ok_or_else(|| format!("{WRONG}; ports are 1 to 65535"))
}

/// Ports in words.
pub(super) fn show(ports: &Ports) -> String {
    let proto = |proto| match proto {
        TCP => "tcp".to_owned(),
        UDP => "udp".to_owned(),
        ICMP | ICMP6 => "icmp".to_owned(),
        other => format!("protocol {other}"),
    };
    match *ports {
        Ports::Any => "any".to_owned(),
        Ports::Protocol(number) => proto(number),
        Ports::Prefix { proto: number, port, bits } => {
            let last = u32::from(port) + (1 << (16 - u32::from(bits.min(16)))) - 1;
            let range =
                if last == u32::from(port) { port.to_string() } else { format!("{port}-{last}") };
            format!("{range}/{}", proto(number))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_allow_what_they_say() {
        let allows = |text: &str, proto, port| {
            parse(text).unwrap().iter().any(|ports| ports.contain(proto, port))
        };
        assert!(allows("any", 132, 7) && allows("icmp", ICMP, 0) && allows("icmp", ICMP6, 0));
        assert!(!allows("icmp", TCP, 0) && allows("tcp", TCP, 9) && !allows("tcp", UDP, 9));
        for port in 0..=u16::MAX {
            assert_eq!(allows("8000-8100/tcp", TCP, port), (8000..=8100).contains(&port));
        }
        assert!(allows("443/tcp", TCP, 443) && !allows("443/tcp", UDP, 443));
        assert!(allows("1-65535/udp", UDP, 65535) && !allows("1-65535/udp", UDP, 0));
    }

    #[test]
    fn what_says_nothing_is_refused() {
        let wrong = [
            "",
            "/",
            "tcp/443",
            "443",
            "443/",
            "/tcp",
            "0/tcp",
            "65536/tcp",
            "-1/tcp",
            "+1/tcp",
            "1-/tcp",
            "2-1/tcp",
            "1-2-3/tcp",
            "443/TCP",
            "443/sctp",
            "ANY",
            "*",
            "443 /tcp",
            "٣/tcp",
        ];
        for text in wrong {
            assert!(parse(text).is_err(), "{text:?}");
        }
        assert!(parse("443/sctp").unwrap_err().contains("SCTP"));
    }
}
