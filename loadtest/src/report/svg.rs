//! Pictures, drawn by hand: percentile curves, bars, and latency over time.
//!
//! Invariant: each is whole by itself, in light and in dark.

use crate::results::Timeline;
use crate::summary::Spread;
use crate::table::duration;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 140.0;
const TOP: f64 = 16.0;
const BOTTOM: f64 = 36.0;
/// Most points of a curve.
const POINTS_MAX: usize = 400;

/// What every picture needs.
pub(super) const STYLE: &str = "
svg text{font:12px system-ui,sans-serif;fill:#57606a}svg .g{stroke:#d0d7de}svg .r{stroke:#1b1f24}
svg .c{fill:none;stroke-width:2}svg .k0{stroke:#57606a;fill:#57606a}svg .k1{stroke:#0969da;fill:#0969da}
svg .k2{stroke:#cf222e;fill:#cf222e}svg .k3{stroke:#bf8700;fill:#bf8700}svg .k4{stroke:#8250df;fill:#8250df}svg .k5{stroke:#1a7f37;fill:#1a7f37}
svg .c{fill:none}svg .h{fill:#0969da}
@media(prefers-color-scheme:dark){svg text{fill:#8b949e}svg .g{stroke:#30363d}svg .r{stroke:#e6edf3}svg .h{fill:#58a6ff}
svg .k0{stroke:#8b949e;fill:#8b949e}svg .k1{stroke:#58a6ff;fill:#58a6ff}svg .k2{stroke:#ff7b72;fill:#ff7b72}svg .c{fill:none}}
";

/// A name, and the latency and calls of each bucket.
pub(super) type Curve = (String, Vec<(f64, u64)>);

/// Latency over percentile: both axes logarithmic, the first by the share that is slower.
pub(super) fn percentiles(curves: &[Curve]) -> String {
    let filled = curves
        .iter()
        .flat_map(|(_, buckets)| buckets.iter().map(|bucket| bucket.0));
    let scale = Scale::over(filled);
    let nines = 5.0;
    let x = |share_slower: f64| {
        LEFT + (-share_slower.log10()).min(nines) / nines * (WIDTH - LEFT - RIGHT)
    };
    let mut parts = scale.grid();
    for (share, label) in [
        (1.0, "0"),
        (0.5, "p50"),
        (0.1, "p90"),
        (0.01, "p99"),
        (0.001, "p99.9"),
        (1e-4, "p99.99"),
    ] {
        let at = x(share);
        parts.push(line("g", (at, TOP), (at, HEIGHT - BOTTOM)));
        parts.push(text((at, HEIGHT - BOTTOM + 18.0), "middle", label));
    }
    for (number, (name, buckets)) in curves.iter().enumerate() {
        let points = thin(&curve(buckets));
        let points: Vec<String> = points
            .iter()
            .map(|(share, value)| format!("{:.1},{:.1}", x(*share), scale.y(*value)))
            .collect();
        let class = class(number, name);
        parts.push(format!(
            "<polyline class=\"c k{class}\" points=\"{}\"/>",
            points.join(" ")
        ));
        parts.push(legend(number, name));
    }
    whole(HEIGHT, &parts)
}

/// A name, and points of x and microseconds.
pub(super) type Line = (String, Vec<(f64, f64)>);

/// Microseconds, on a logarithmic axis, over a linear one from 0 whose values are of `unit`.
pub(super) fn lines(lines: &[Line], unit: &str) -> String {
    let points = || lines.iter().flat_map(|(_, points)| points.iter());
    let scale = Scale::over(points().map(|point| point.1));
    let most = points().map(|point| point.0).fold(1e-9, f64::max);
    let x = |value: f64| LEFT + value / most * (WIDTH - LEFT - RIGHT);
    let mut parts = scale.grid();
    for part in 0..=4 {
        let value = f64::from(part) / 4.0 * most;
        let label = format!("{value:.0} {unit}");
        parts.push(line("g", (x(value), TOP), (x(value), HEIGHT - BOTTOM)));
        parts.push(text((x(value), HEIGHT - BOTTOM + 18.0), "middle", &label));
    }
    for (number, (name, points)) in lines.iter().enumerate() {
        let class = class(number, name);
        let dash = dash(name);
        let at = points
            .iter()
            .map(|(at, value)| format!("{:.1},{:.1}", x(*at), scale.y(*value)));
        let at: Vec<String> = at.collect();
        parts.push(format!(
            "<polyline class=\"c k{class}\"{dash} points=\"{}\"/>",
            at.join(" ")
        ));
        parts.extend(points.iter().map(|(at, value)| {
            format!(
                "<circle class=\"k{class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"/>",
                x(*at),
                scale.y(*value)
            )
        }));
        parts.push(legend(number, name));
    }
    whole(HEIGHT, &parts)
}

/// Share of the calls that are slower, and the latency.
#[expect(clippy::cast_precision_loss, reason = "counts stay below 2^53")]
fn curve(buckets: &[(f64, u64)]) -> Vec<(f64, f64)> {
    let total: u64 = buckets.iter().map(|bucket| bucket.1).sum();
    let mut below = 0;
    let mut points = Vec::new();
    for (value, count) in buckets {
        points.push(((total - below) as f64 / total as f64, *value));
        below += count;
    }
    points
}

fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let step = points.len().div_ceil(POINTS_MAX).max(1);
    let last = points.len().saturating_sub(1);
    let kept = points
        .iter()
        .enumerate()
        .filter(|(at, _)| at % step == 0 || *at == last);
    // The tail is thin already: keep it whole.
    let tail = points.iter().filter(|(share, _)| *share < 0.02);
    let mut all: Vec<(f64, f64)> = kept.map(|(_, point)| *point).chain(tail.copied()).collect();
    all.sort_by(|left, right| right.0.total_cmp(&left.0));
    all
}

/// A target keeps its colour from picture to picture.
fn class(number: usize, name: &str) -> usize {
    match name.split(' ').next() {
        Some("direct") => 0,
        Some("sidegate") => 1,
        Some("envoy-h1") => 2,
        Some("envoy-h2") => 3,
        _ => number % 6,
    }
}

/// The p99 of a target has its colour, and is dashed.
fn dash(name: &str) -> &'static str {
    if name.ends_with("p99") {
        " stroke-dasharray=\"5 4\""
    } else {
        ""
    }
}

/// Bars with the range over repetitions.
#[expect(clippy::cast_precision_loss, reason = "a handful of bars")]
pub(super) fn bars(bars: &[(String, Spread)], unit: &str) -> String {
    let most = bars
        .iter()
        .map(|(_, spread)| spread.high)
        .fold(1e-9, f64::max);
    let left = 150.0;
    let x = |value: f64| left + value / most * (WIDTH - left - 150.0);
    let mut parts = Vec::new();
    for (number, (name, spread)) in bars.iter().enumerate() {
        let y = TOP + number as f64 * 28.0;
        let class = class(number, name);
        parts.push(text((left - 8.0, y + 15.0), "end", name));
        parts.push(format!(
            "<rect class=\"k{class}\" x=\"{left}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"20\"/>",
            x(spread.median) - left
        ));
        parts.push(line(
            "r",
            (x(spread.low), y + 10.0),
            (x(spread.high), y + 10.0),
        ));
        let label = format!(
            "{:.1} {unit} ({:.1}–{:.1})",
            spread.median, spread.low, spread.high
        );
        parts.push(text((x(spread.high) + 6.0, y + 15.0), "start", &label));
    }
    whole(TOP * 2.0 + bars.len() as f64 * 28.0, &parts)
}

/// Calls by time and latency; the darker, the more.
#[expect(clippy::cast_precision_loss, reason = "a few hundred columns and rows")]
pub(super) fn heat(timeline: &Timeline) -> String {
    let value = |row: usize| (row as f64 / 4.0).exp2();
    let rows = timeline.cells.iter().map(|cell| cell.1);
    let scale = Scale::over(rows.flat_map(|row| [value(row), value(row + 1)]));
    let width = (WIDTH - LEFT - RIGHT) / timeline.columns.max(1) as f64;
    let most = timeline.cells.iter().map(|cell| cell.2).max().unwrap_or(1);
    let mut parts = scale.grid();
    for (column, row, calls) in &timeline.cells {
        let shade = 0.15 + 0.85 * f64::from(*calls).ln_1p() / f64::from(most).ln_1p();
        let (top, bottom) = (scale.y(value(row + 1)), scale.y(value(*row)));
        parts.push(format!(
            "<rect class=\"h\" x=\"{:.1}\" y=\"{top:.1}\" width=\"{:.2}\" height=\"{:.1}\" opacity=\"{shade:.2}\"/>",
            LEFT + *column as f64 * width,
            width,
            bottom - top
        ));
    }
    let length = timeline.columns as f64 * timeline.column_ms / 1e3;
    for part in 0..=4 {
        let at = f64::from(part) / 4.0;
        let label = format!("{:.1} s", at * length);
        parts.push(text(
            (LEFT + at * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM + 18.0),
            "middle",
            &label,
        ));
    }
    whole(HEIGHT, &parts)
}

/// A logarithmic axis of microseconds, in whole decades.
struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    fn over(values: impl Iterator<Item = f64>) -> Self {
        let (mut low, mut high) = (f64::MAX, 0.0_f64);
        for value in values {
            low = low.min(value.max(0.1));
            high = high.max(value);
        }
        if high <= 0.0 {
            (low, high) = (1.0, 1e6);
        }
        Self {
            low: low.log10().floor(),
            high: high.log10().ceil().max(low.log10().floor() + 1.0),
        }
    }

    fn y(&self, value: f64) -> f64 {
        let share = (value.max(0.1).log10() - self.low) / (self.high - self.low);
        HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
    }

    fn grid(&self) -> Vec<String> {
        let mut parts = Vec::new();
        let mut decade = self.low;
        while decade <= self.high {
            for part in 1..=9 {
                let value = f64::from(part) * 10.0_f64.powf(decade);
                let y = self.y(value);
                if y >= TOP - 0.5 && (part == 1 || self.high - self.low <= 2.0) {
                    parts.push(line("g", (LEFT, y), (WIDTH - RIGHT, y)));
                }
                if y >= TOP - 0.5 && part == 1 {
                    parts.push(text((LEFT - 6.0, y + 4.0), "end", &duration(value)));
                }
            }
            decade += 1.0;
        }
        parts
    }
}

#[expect(clippy::cast_precision_loss, reason = "a handful of curves")]
fn legend(number: usize, name: &str) -> String {
    let y = TOP + 12.0 + number as f64 * 20.0;
    let x = WIDTH - RIGHT + 12.0;
    let stroke = format!(
        "<line class=\"k{}\"{} x1=\"{x}\" y1=\"{y}\" x2=\"{}\" y2=\"{y}\" stroke-width=\"3\"/>",
        class(number, name),
        dash(name),
        x + 16.0
    );
    stroke + &text((x + 22.0, y + 4.0), "start", name)
}

fn line(class: &str, from: (f64, f64), to: (f64, f64)) -> String {
    format!(
        "<line class=\"{class}\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>",
        from.0, from.1, to.0, to.1
    )
}

fn text(at: (f64, f64), anchor: &str, words: &str) -> String {
    let words = super::escape(words);
    format!(
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{words}</text>",
        at.0, at.1
    )
}

fn whole(height: f64, parts: &[String]) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\"><style>{STYLE}</style>{}</svg>",
        parts.concat()
    )
}
