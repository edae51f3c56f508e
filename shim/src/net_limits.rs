//! How much of the network a pod may use: bits and packets a second, out of the pod (egress) and into it
//! (ingress), by annotation, changeable while it runs (`joey limit`).
//!
//! Bits are shaped: what is too early waits (`joey_ebpf::shape`). Packets beyond their number are dropped by
//! the policy's programs. The bandwidth annotations of Kubernetes' CNI plugin mean the same and are followed
//! where Joey's own say nothing.

use std::collections::HashMap;

use crate::sizing::SizingError;

/// Joey's annotations, in the order of [`NetLimits`]' fields.
pub const NET_LIMITS: [&str; 4] = [
    "io.joey.network.egress-bits",
    "io.joey.network.ingress-bits",
    "io.joey.network.egress-packets",
    "io.joey.network.ingress-packets",
];
/// What Kubernetes' own are called, for the first two.
pub const BANDWIDTH: [&str; 2] =
    ["kubernetes.io/egress-bandwidth", "kubernetes.io/ingress-bandwidth"];
/// What the bandwidth plugin takes: one kilobit to one petabit.
const BITS: std::ops::RangeInclusive<u64> = 1000..=1_000_000_000_000_000;
/// A nanosecond for each packet.
const PACKETS: std::ops::RangeInclusive<u64> = 1..=1_000_000_000;

/// Limits a second; 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetLimits {
    /// Bits that leave the pod.
    pub egress_bits: u64,
    /// Bits that reach it.
    pub ingress_bits: u64,
    /// Packets that leave it.
    pub egress_packets: u64,
    /// Packets that reach it.
    pub ingress_packets: u64,
}

impl NetLimits {
    fn fields(&mut self) -> [&mut u64; 4] {
        [
            &mut self.egress_bits,
            &mut self.ingress_bits,
            &mut self.egress_packets,
            &mut self.ingress_packets,
        ]
    }

    /// Whether packets are limited.
    #[must_use]
    pub fn limits_packets(&self) -> bool {
        self.egress_packets != 0 || self.ingress_packets != 0
    }

    /// What annotations make of it: limits that they do not name stay.
    ///
    /// # Errors
    /// One that cannot be followed.
    pub fn annotated(mut self, notes: &HashMap<String, String>) -> Result<Self, SizingError> {
        let others = BANDWIDTH.map(Some).into_iter().chain([None, None]);
        for ((name, other), field) in NET_LIMITS.into_iter().zip(others).zip(self.fields()) {
            let given = |name: &'static str| notes.get(name).map(|value| (name, value));
            let Some((name, value)) = given(name).or_else(|| other.and_then(given)) else {
                continue;
            };
            let (range, like) = match other {
                Some(_) => (BITS, "bits a second, like 500k, 10M or 1Gi, from 1k to 1P"),
                None => (PACKETS, "packets a second, like 500 or 20k, from 1 to 1G"),
            };
            let number = quantity(value).filter(|number| *number == 0 || range.contains(number));
            *field = number.ok_or_else(|| SizingError {
                name: name.to_owned(),
                value: value.clone(),
                reason: format!("must be {like}; 0: no limit"),
            })?;
        }
        Ok(self)
    }
}

/// A whole number as Kubernetes writes quantities (`k8s.io/apimachinery/pkg/api/resource`): digits, perhaps
/// with a fraction, and a unit.
fn quantity(text: &str) -> Option<u64> {
    let units = [
        ("Ki", 1_u64 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("Pi", 1 << 50),
        ("k", 1000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
        ("P", 1_000_000_000_000_000),
        ("", 1),
    ];
    let (digits, unit) =
        units.into_iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))?;
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let number = |digits: &str| {
        let fine = digits.len() <= 18 && digits.bytes().all(|byte| byte.is_ascii_digit());
        if fine { Some(digits.parse::<u128>().unwrap_or(0)) } else { None }
    };
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let scale = 10_u128.pow(u32::try_from(fraction.len().min(18)).ok()?);
    let parts = number(whole)? * scale + number(fraction)?;
    let scaled = parts * u128::from(unit);
    (scaled % scale == 0).then(|| u64::try_from(scaled / scale).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(notes: &[(&str, &str)]) -> Result<NetLimits, String> {
        let notes = notes.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        NetLimits::default().annotated(&notes).map_err(|error| error.to_string())
    }

    #[test]
    fn quantities() {
        let known = [
            ("10M", 10_000_000),
            ("1.5M", 1_500_000),
            ("1Gi", 1 << 30),
            ("500k", 500_000),
            ("12345", 12345),
            ("0", 0),
            (".5k", 500),
        ];
        for (text, number) in known {
            assert_eq!(quantity(text), Some(number), "{text}");
        }
        let strange = ["", "M", "-1", "1e3", "10m", "1.2345", "ten", "1 M", "99999999999999999999"];
        for text in strange {
            assert_eq!(quantity(text), None, "{text}");
        }
    }

    #[test]
    fn joeys_annotations_go_before_kubernetes() {
        let [egress, ingress] = BANDWIDTH;
        let limits = of(&[(egress, "10M"), (ingress, "20M"), (NET_LIMITS[0], "1M")]).unwrap();
        assert_eq!((limits.egress_bits, limits.ingress_bits), (1_000_000, 20_000_000));
        assert_eq!(limits.egress_packets, 0);
        let limits = of(&[(NET_LIMITS[3], "20k")]).unwrap();
        assert!(limits.limits_packets() && limits.ingress_packets == 20_000);
        for (name, value) in [(egress, "1"), (NET_LIMITS[1], "2P"), (NET_LIMITS[2], "x")] {
            let error = of(&[(name, value)]).unwrap_err();
            assert!(error.contains(name) && error.contains(value), "{error}");
        }
    }
}
