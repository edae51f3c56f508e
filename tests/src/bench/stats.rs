//! Samples to percentiles, a table and JSON. Pure.

use serde::Serialize;

/// One metric of one subject.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// `joey` or `runc`, and with `+` what sets it apart: `joey+50_layers`.
    pub subject: String,
    /// What was measured.
    pub metric: String,
    /// `ms` or `MiB`.
    pub unit: String,
    /// Number of samples.
    pub n: usize,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
}

/// One subject's metric over another's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// What was measured.
    pub metric: String,
    /// Numerator.
    pub of: String,
    /// Denominator.
    pub to: String,
    /// Of the medians.
    pub p50: f64,
    /// Of the 99th percentiles.
    pub p99: f64,
    /// Of one sample to the other's of the same turn, where both have as many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paired: Option<Paired>,
}

/// Ratios of samples that were taken one right after the other: what the machine did meanwhile is in both.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Paired {
    /// Number of pairs.
    pub n: usize,
    /// 10th percentile.
    pub p10: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
}

/// A benchmark's outcome.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The benchmark.
    pub name: String,
    /// Where it ran.
    pub machine: String,
    /// The figures.
    pub rows: Vec<Row>,
    /// How they compare.
    pub ratios: Vec<Ratio>,
}

/// Samples by subject and metric, in order of first appearance.
#[derive(Debug, Default)]
pub struct Samples(Vec<(String, String, String, Vec<f64>)>);

impl Samples {
    /// Adds one sample.
    pub fn add(&mut self, subject: &str, metric: &str, unit: &str, value: f64) {
        match self.0.iter_mut().find(|(s, m, _, _)| s == subject && m == metric) {
            Some((_, _, _, values)) => values.push(value),
            None => self.0.push((subject.into(), metric.into(), unit.into(), vec![value])),
        }
    }

    /// The report with ratios of the first over the second of each pair, for every metric both have.
    pub fn report(self, name: &str, machine: &str, pairs: &[(&str, &str)]) -> Report {
        let rows: Vec<Row> = (self.0.iter().cloned())
            .map(|(subject, metric, unit, mut values)| {
                values.sort_by(f64::total_cmp);
                let at = |percent| round(percentile(&values, percent));
                let (p50, p90, p99) = (at(50.0), at(90.0), at(99.0));
                Row { subject, metric, unit, n: values.len(), p50, p90, p99 }
            })
            .collect();
        let find = |subject: &str, metric: &str| {
            rows.iter().find(|row| row.subject == subject && row.metric == metric)
        };
        let ratio = |row: &Row, to: &str| {
            let base = find(to, &row.metric).filter(|base| base.p50 > 0.0 && base.p99 > 0.0)?;
            Some(Ratio {
                metric: row.metric.clone(),
                of: row.subject.clone(),
                to: to.into(),
                p50: round(row.p50 / base.p50),
                p99: round(row.p99 / base.p99),
                paired: self.paired(&row.subject, to, &row.metric),
            })
        };
        let of_row = |row: &Row| -> Vec<Ratio> {
            pairs
                .iter()
                .filter(|(of, _)| row.subject == *of)
                .filter_map(|(_, to)| ratio(row, to))
                .collect()
        };
        let ratios = rows.iter().flat_map(of_row).collect();
        Report { name: name.into(), machine: machine.into(), rows, ratios }
    }

    fn paired(&self, of: &str, to: &str, metric: &str) -> Option<Paired> {
        let values = |subject| self.0.iter().find(|(s, m, ..)| s == subject && m == metric);
        let (of, to) = (&values(of)?.3, &values(to)?.3);
        if of.len() != to.len() || to.iter().any(|value| *value <= 0.0) {
            return None;
        }
        let mut ratios: Vec<f64> = of.iter().zip(to).map(|(of, to)| of / to).collect();
        ratios.sort_by(f64::total_cmp);
        let at = |percent| round(percentile(&ratios, percent));
        Some(Paired { n: ratios.len(), p10: at(10.0), p50: at(50.0), p90: at(90.0) })
    }
}

/// Nearest rank in sorted values.
fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(0.0)
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

impl Report {
    /// For people: every metric with both subjects side by side and bars.
    pub fn table(&self) -> String {
        let mut text = format!("{} on {}\n\n", self.name, self.machine);
        text += "metric                 subject             n      p50      p90      p99 unit\n";
        let mut metrics: Vec<&str> = Vec::new();
        for row in &self.rows {
            if !metrics.contains(&row.metric.as_str()) {
                metrics.push(&row.metric);
            }
        }
        for metric in metrics {
            let rows: Vec<&Row> = self.rows.iter().filter(|row| row.metric == metric).collect();
            let most = rows.iter().map(|row| row.p50).fold(0.0, f64::max);
            for row in rows {
                let filled = if most > 0.0 { (row.p50 / most * 24.0).round() as usize } else { 0 };
                text += &format!(
                    "{:<22} {:<16} {:>4} {:>8.1} {:>8.1} {:>8.1} {:<4} {}\n",
                    row.metric,
                    row.subject,
                    row.n,
                    row.p50,
                    row.p90,
                    row.p99,
                    row.unit,
                    "█".repeat(filled.max(1))
                );
            }
            for ratio in self.ratios.iter().filter(|ratio| ratio.metric == metric) {
                let pair = format!("{} : {}", ratio.of, ratio.to);
                text += &format!("{:<22} {pair:<24} {:>5.2} {:>17.2}", "", ratio.p50, ratio.p99);
                if let Some(Paired { n, p10, p50, p90 }) = ratio.paired {
                    text += &format!("   by turns {p50:.2} ({p10:.2} to {p90:.2}, n = {n})");
                }
                text += "\n";
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&values, 50.0), 50.0);
        assert_eq!(percentile(&values, 99.0), 99.0);
        assert_eq!(percentile(&[7.0], 99.0), 7.0);
        assert_eq!(percentile(&[], 50.0), 0.0);
    }

    #[test]
    fn ratios_compare_what_both_have() {
        let mut samples = Samples::default();
        samples.add("joey", "run", "ms", 30.0);
        samples.add("runc", "run", "ms", 20.0);
        samples.add("joey", "only", "MiB", 1.0);
        let report = samples.report("start", "here", &[("joey", "runc")]);
        assert_eq!(report.ratios.len(), 1);
        let paired = Some(Paired { n: 1, p10: 1.5, p50: 1.5, p90: 1.5 });
        assert_eq!(report.ratios[0].paired, paired);
        assert_eq!(report.ratios[0].p50, 1.5);
        assert!(report.table().contains("run"));
    }
}
