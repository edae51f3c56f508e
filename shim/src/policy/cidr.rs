//! Prefixes of addresses as people write them.

use std::net::IpAddr;

use joey_ebpf::policy::abi::Prefix;

/// Reads `10.0.0.0/8`, `fd00::/64`, or an address for itself. Bits behind the prefix must be zero: who
/// wrote them meant something else.
pub(crate) fn parse(text: &str) -> Result<Prefix, String> {
    let wrong =
        || "must be an address, or one with a prefix length: 10.0.0.0/8, fd00::/64".to_owned();
    let (address, bits) = match text.split_once('/') {
        Some((address, bits)) => (address, Some(bits)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    check_family(address)?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let bits = match bits {
        None => most,
        // Neither "+8" nor "08".
        Some(bits) if bits != "0" && !bits.starts_with(|c: char| matches!(c, '1'..='9')) => {
            return Err(wrong());
        }
        Some(bits) => bits.parse().ok().filter(|bits| *bits <= most).ok_or_else(wrong)?,
    };
    let prefix = Prefix { address, bits };
    let clean = masked(prefix);
    if clean != prefix {
        return Err(format!("has bits behind its prefix; {} is the whole prefix", show(clean)));
    }
    Ok(prefix)
}

/// Refuses IPv4 addresses in the clothes of IPv6: no packet has them.
pub(super) fn check_family(address: IpAddr) -> Result<(), String> {
    match address {
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => Err(format!("is an IPv4 address; write {v4}")),
            None => Ok(()),
        },
        IpAddr::V4(_) => Ok(()),
    }
}

/// The address in 128 bits, the first at the top.
pub(super) fn word(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()) << 96,
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn masked(prefix: Prefix) -> Prefix {
    let mask = u128::MAX.checked_shl(128 - u32::from(prefix.bits)).unwrap_or(0);
    let word = word(prefix.address) & mask;
    let address = match prefix.address {
        IpAddr::V4(_) => IpAddr::V4(std::net::Ipv4Addr::from_bits((word >> 96) as u32)),
        IpAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::from_bits(word)),
    };
    Prefix { address, ..prefix }
}

/// The prefix of one address.
pub(super) fn host(address: IpAddr) -> Prefix {
    Prefix { address, bits: if address.is_ipv4() { 32 } else { 128 } }
}

/// Whether all of `inner` is in `outer`.
pub(super) fn covers(outer: Prefix, inner: Prefix) -> bool {
    outer.bits <= inner.bits && outer.contains(inner.address)
}

/// As people write it.
pub(super) fn show(prefix: Prefix) -> String {
    format!("{}/{}", prefix.address, prefix.bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_read_and_written() {
        for text in ["0.0.0.0/0", "10.0.0.0/8", "1.2.3.4/32", "::/0", "fd00::/64", "fd00::1/128"] {
            assert_eq!(show(parse(text).unwrap()), text);
        }
        assert_eq!(show(parse("1.2.3.4").unwrap()), "1.2.3.4/32");
        assert_eq!(show(parse("fd00::a").unwrap()), "fd00::a/128");
    }

    #[test]
    fn what_is_no_prefix_is_refused() {
        let wrong = [
            "",
            "/",
            "10.0.0.0/",
            "10.0.0.0/33",
            "fd00::/129",
            "10.0.0.0/-1",
            "10.0.0.0/+8",
            "10.0.0.0/08",
            "10.0.0/8",
            "10.0.0.0/8/8",
            " 10.0.0.0/8",
            "010.0.0.1",
            "fe80::1%eth0",
            "host",
            "10.0.0.0/999999999999999999999",
            "０.0.0.0/0",
        ];
        for text in wrong {
            assert!(parse(text).is_err(), "{text:?}");
        }
        assert!(parse("10.1.2.3/8").unwrap_err().contains("10.0.0.0/8"));
        assert!(parse("::ffff:10.0.0.1").unwrap_err().contains("write 10.0.0.1"));
    }

    #[test]
    fn covering() {
        let p = |text| parse(text).unwrap();
        assert!(covers(p("10.0.0.0/8"), p("10.1.0.0/16")));
        assert!(covers(p("10.0.0.0/8"), p("10.0.0.0/8")));
        assert!(!covers(p("10.1.0.0/16"), p("10.0.0.0/8")));
        assert!(!covers(p("::/0"), p("10.0.0.0/8")));
        assert!(covers(p("0.0.0.0/0"), p("255.0.0.0/8")));
    }
}
