//! A sandbox's start as bars: where the time went.

use std::fmt::Write as _;

use joey_shim::sandbox::timeline::Steps;

/// Width of the widest bar.
const WIDTH: f64 = 48.0;

/// Draws the steps; the scale is the whole start.
pub(crate) fn draw(steps: &Steps) -> String {
    let mut text = String::new();
    let end = steps.steps.iter().map(|step| step.start_ms + step.took_ms).fold(0.0, f64::max);
    if end <= 0.0 {
        return "no timeline yet\n".to_owned();
    }
    let _ = writeln!(text, "{:<40} {:>9} {:>9}", "STEP (ms)", "FROM", "TOOK");
    for step in &steps.steps {
        let scale = |ms: f64| (ms / end * WIDTH).round().clamp(0.0, WIDTH);
        // Both are between 0 and WIDTH.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let (left, bar) = (scale(step.start_ms) as usize, scale(step.took_ms).max(1.0) as usize);
        let indent = match step.side.as_str() {
            "guest" => "  guest: ",
            "vmm" => "  vmm: ",
            _ => "",
        };
        let of = step.container.chars().take(6).collect::<String>();
        let of = if of.is_empty() { of } else { format!(" [{of}]") };
        let name = format!("{indent}{}{of}", step.name);
        let _ = writeln!(
            text,
            "{name:<40.40} {:>9.1} {:>9.1}  {}{}",
            step.start_ms,
            step.took_ms,
            " ".repeat(left),
            if step.side == "host" { "█" } else { "▒" }.repeat(bar),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use joey_shim::sandbox::timeline::Step;

    use super::*;

    #[test]
    fn every_step_has_a_line_and_a_bar() {
        let step = |name: &str, side: &str, start_ms, took_ms| Step {
            name: name.to_owned(),
            container: String::new(),
            side: side.to_owned(),
            start_ms,
            took_ms,
        };
        let steps = Steps {
            steps: vec![step("clone", "host", 2.0, 60.0), step("clock", "guest", 62.0, 0.1)],
            ..Steps::default()
        };
        let text = draw(&steps);
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.contains("clone") && text.contains("guest: clock"), "{text}");
        assert!(text.lines().skip(1).all(|line| line.contains(['█', '▒'])), "{text}");
        assert_eq!(draw(&Steps::default()), "no timeline yet\n");
    }
}
