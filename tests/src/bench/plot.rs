//! The report as an SVG picture: a bar for each metric's median, a line up to its 99th percentile.

use super::stats::{Report, Row};

const WIDTH: f64 = 760.0;
const LEFT: f64 = 190.0;
const BAR: f64 = 16.0;
const GAP: f64 = 18.0;

/// Draws the report.
pub fn svg(report: &Report) -> String {
    let mut body = String::new();
    let mut y = 56.0;
    let mut done: Vec<&str> = Vec::new();
    for row in &report.rows {
        if done.contains(&row.metric.as_str()) {
            continue;
        }
        done.push(&row.metric);
        let rows: Vec<&Row> = report.rows.iter().filter(|r| r.metric == row.metric).collect();
        let most = rows.iter().map(|row| row.p99).fold(f64::MIN_POSITIVE, f64::max);
        body += &format!("<text x='12' y='{:.0}'>{}</text>\n", y + BAR * 0.8, escape(&row.metric));
        for row in rows {
            body += &bar(row, y, (WIDTH - LEFT - 150.0) / most);
            y += BAR + 3.0;
        }
        y += GAP;
    }
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{y:.0}' \
         font-family='sans-serif' font-size='13'>\n<rect width='100%' height='100%' fill='white'/>\n\
         <text x='12' y='22' font-size='16'>{}: median (bar), 99th percentile (line)</text>\n\
         <text x='12' y='42' fill='#666'>{}</text>\n{body}</svg>\n",
        escape(&report.name),
        escape(&report.machine)
    )
}

fn bar(row: &Row, y: f64, scale: f64) -> String {
    let colour = if row.subject.starts_with("joey") { "#c8641e" } else { "#5078a0" };
    let (end, far) = (row.p50 * scale, row.p99 * scale);
    let middle = y + BAR / 2.0;
    format!(
        "<rect x='{LEFT}' y='{y:.1}' width='{end:.1}' height='{BAR}' fill='{colour}'/>\n\
         <line x1='{:.1}' x2='{:.1}' y1='{middle:.1}' y2='{middle:.1}' stroke='{colour}'/>\n\
         <text x='{:.1}' y='{:.1}'>{} {:.1} {}</text>\n",
        LEFT + end,
        LEFT + far,
        LEFT + far + 8.0,
        y + BAR * 0.8,
        escape(&row.subject),
        row.p50,
        escape(&row.unit),
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::super::stats::Samples;

    #[test]
    fn names_are_escaped() {
        let mut samples = Samples::default();
        samples.add("joey", "a<b", "ms", 1.0);
        let picture = super::svg(&samples.report("x", "m&n", &[("joey", "runc")]));
        assert!(picture.contains("a&lt;b") && picture.contains("m&amp;n"));
    }
}
