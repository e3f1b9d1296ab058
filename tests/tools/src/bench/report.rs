//! The bench's output: a table, `report.json` and `report.html`.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;

use super::stats::{Pair, QUANTILES, quantile};

/// One number and its floor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Row {
    /// What was measured, and how.
    pub(super) name: String,
    /// Ours.
    pub(super) ours: f64,
    /// The floor, if there is one.
    pub(super) floor: Option<f64>,
    /// The unit of both.
    pub(super) unit: &'static str,
    /// Ours over the floor.
    pub(super) ratio: Option<f64>,
    /// The target.
    pub(super) reach: Option<&'static str>,
}

/// A line or a step curve.
#[derive(Clone, Debug)]
pub(super) struct Series {
    /// What it shows.
    pub(super) name: String,
    /// Its points, x and y above 0.
    pub(super) points: Vec<(f64, f64)>,
}

/// A plot over a logarithmic x axis.
#[derive(Clone, Debug)]
pub(super) struct Plot {
    /// The title.
    pub(super) title: String,
    /// The x axis's label.
    pub(super) x: &'static str,
    /// The y axis's label.
    pub(super) y: &'static str,
    /// Whether the y axis is logarithmic as well.
    pub(super) log_y: bool,
    /// What is drawn.
    pub(super) series: Vec<Series>,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Report {
    rows: Vec<Row>,
    plots: Vec<Plot>,
}

impl Report {
    /// Adds a row, and prints it.
    pub(super) fn row(&mut self, row: Row) {
        println!("{}", line(&row));
        self.rows.push(row);
    }

    /// Adds a number that has no floor.
    pub(super) fn number(
        &mut self,
        name: impl Into<String>,
        ours: f64,
        unit: &'static str,
        reach: Option<&'static str>,
    ) {
        self.row(Row {
            name: name.into(),
            ours,
            floor: None,
            unit,
            ratio: None,
            reach,
        });
    }

    /// Adds a latency's quantiles, in µs of samples in ns, and its plot. `reach` has the targets of
    /// p50 and p99.
    pub(super) fn latency(&mut self, name: &str, pair: &Pair, reach: [Option<&'static str>; 2]) {
        let [ours, floor] = pair.pooled();
        let reach = reach.into_iter().chain([None]);
        for ((quantile_name, part), reach) in QUANTILES.into_iter().zip(reach) {
            self.row(Row {
                name: format!("{name}: {quantile_name}"),
                ours: quantile(&ours, part) / 1e3,
                floor: Some(quantile(&floor, part) / 1e3),
                unit: "µs",
                ratio: Some(pair.ratio(part)),
                reach,
            });
        }
        let curve = |name: &str, sorted: &[f64]| Series {
            name: name.to_owned(),
            points: (1..=200)
                .map(|n| f64::from(n) / 200.0)
                .chain([0.999])
                .map(|part| (quantile(sorted, part) / 1e3, part))
                .collect(),
        };
        self.plot(Plot {
            title: name.to_owned(),
            x: "µs",
            y: "part of the samples at or below x",
            log_y: false,
            series: vec![curve("ours", &ours), curve("floor", &floor)],
        });
    }

    /// Adds a plot.
    pub(super) fn plot(&mut self, plot: Plot) {
        self.plots.push(plot);
    }

    /// Prints that a row is left out, and why.
    pub(super) fn skip(&self, name: &str, why: &str) {
        println!("{name:<72} -- left out: {why}");
    }

    /// The rows as JSON.
    ///
    /// # Errors
    ///
    /// If JSON cannot express a number.
    pub(super) fn json(&self) -> io::Result<String> {
        Ok(serde_json::to_string_pretty(&self.rows)?)
    }

    /// Writes `report.json` and `report.html` to a folder.
    ///
    /// # Errors
    ///
    /// Errors of the file system.
    pub(super) fn write(&self, folder: &Path) -> io::Result<()> {
        fs::create_dir_all(folder)?;
        fs::write(folder.join("report.json"), self.json()?)?;
        fs::write(folder.join("report.html"), self.html())
    }

    fn html(&self) -> String {
        let mut html = String::from(
            "<!DOCTYPE html><html lang=en><meta charset=utf-8><title>vhost-user-timer: bench</title>\
             <style>body{font:15px/1.4 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}\
             table{border-collapse:collapse}td,th{padding:.2em .7em;border-bottom:1px solid #ccc;\
             text-align:right}td:first-child,th:first-child,td:last-child{text-align:left}\
             figure{display:inline-block;margin:1em}figcaption{max-width:32em;font-weight:bold}\
             </style><h1>vhost-user-timer: bench</h1><p>Ours and its floor, measured alternately in \
             this run.<table><tr><th>row<th>ours<th>floor<th>unit<th>ratio<th>target",
        );
        for row in &self.rows {
            let _ = write!(
                html,
                "<tr><td>{}<td>{}<td>{}<td>{}<td>{}<td>{}",
                escaped(&row.name),
                figure(row.ours),
                row.floor.map(figure).unwrap_or_default(),
                row.unit,
                row.ratio.map(ratio).unwrap_or_default(),
                escaped(row.reach.unwrap_or_default()),
            );
        }
        html.push_str("</table>");
        for plot in &self.plots {
            html.push_str(&drawn(plot));
        }
        html
    }
}

/// The table's head.
pub(super) fn head() -> String {
    format!(
        "{:<72} {:>10} {:>10} {:<8} {:>6}  {}",
        "row", "ours", "floor", "unit", "ratio", "target"
    )
}

fn line(row: &Row) -> String {
    format!(
        "{:<72} {:>10} {:>10} {:<8} {:>6}  {}",
        row.name,
        figure(row.ours),
        row.floor.map(figure).unwrap_or_default(),
        row.unit,
        row.ratio.map(ratio).unwrap_or_default(),
        row.reach.unwrap_or_default()
    )
}

fn ratio(value: f64) -> String {
    format!("{value:.2}")
}

/// Three significant digits or more.
fn figure(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        small if small < 10.0 => format!("{value:.3}"),
        middling if middling < 1000.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// Maps values to positions in the plot.
struct Axis {
    from: f64,
    to: f64,
    log: bool,
    start: f64,
    length: f64,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64> + Clone, log: bool, start: f64, length: f64) -> Self {
        let map = |value: f64| if log { value.max(1e-9).log10() } else { value };
        let least = values.clone().map(map).fold(f64::INFINITY, f64::min);
        let most = values.map(map).fold(f64::NEG_INFINITY, f64::max);
        let (from, to) = match log {
            true => (least.floor(), most.ceil().max(least.floor() + 1.0)),
            false => (0.0, most.max(1e-9)),
        };
        Axis {
            from,
            to,
            log,
            start,
            length,
        }
    }

    fn place(&self, value: f64) -> f64 {
        let value = if self.log {
            value.max(1e-9).log10()
        } else {
            value
        };
        self.start + (value - self.from) / (self.to - self.from) * self.length
    }

    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let decades = self.from as i32..=self.to as i32;
            return decades.map(|decade| 10_f64.powi(decade)).collect();
        }
        (0..=4).map(|n| self.to * f64::from(n) / 4.0).collect()
    }
}

const COLOURS: [&str; 6] = [
    "#c0392b", "#2471a3", "#1e8449", "#b7950b", "#7d3c98", "#566573",
];

/// A plot as inline SVG.
fn drawn(plot: &Plot) -> String {
    let points = || plot.series.iter().flat_map(|series| series.points.iter());
    let mut svg = format!(
        "<figure><figcaption>{}</figcaption><svg width=520 height=300 viewBox='0 0 520 300' \
         font-size=11 font-family=sans-serif>",
        escaped(&plot.title)
    );
    if points().next().is_none() {
        return svg + "</svg></figure>";
    }
    let x = Axis::over(points().map(|p| p.0), true, 55.0, 445.0);
    let y = Axis::over(points().map(|p| p.1), plot.log_y, 255.0, -240.0);
    for tick in x.ticks() {
        let at = x.place(tick);
        let _ = write!(
            svg,
            "<path d='M{at:.1} 15V255' stroke='#ddd'/><text x={at:.1} y=270 \
             text-anchor=middle>{tick}</text>"
        );
    }
    for tick in y.ticks() {
        let at = y.place(tick);
        let _ = write!(
            svg,
            "<path d='M55 {at:.1}H500' stroke='#ddd'/><text x=50 y={at:.1} \
             text-anchor=end>{tick}</text>"
        );
    }
    for (series, colour) in plot.series.iter().zip(COLOURS.iter().cycle()) {
        let mut path = String::new();
        for (n, point) in series.points.iter().enumerate() {
            let command = if n == 0 { 'M' } else { 'L' };
            let _ = write!(
                path,
                "{command}{:.1} {:.1}",
                x.place(point.0),
                y.place(point.1)
            );
        }
        let _ = write!(
            svg,
            "<path d='{path}' fill=none stroke='{colour}' stroke-width=1.5 />"
        );
    }
    for (n, (series, colour)) in plot.series.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let at = 28 + 14 * n;
        let _ = write!(
            svg,
            "<text x=62 y={at} fill='{colour}'>{}</text>",
            escaped(&series.name)
        );
    }
    let _ = write!(
        svg,
        "<text x=277 y=290 text-anchor=middle>{}</text><text x=12 y=135 text-anchor=middle \
         transform='rotate(-90 12 135)'>{}</text></svg></figure>",
        plot.x, plot.y
    );
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::default();
        let mut pair = Pair::default();
        pair.add(vec![3000.0; 100], vec![2000.0; 100]);
        report.latency("a < b", &pair, [Some("1.6 × floor"), None]);
        report.number("size", 4.0, "MB", Some("4 MB"));
        report
    }

    #[test]
    fn the_json_is_an_array_of_flat_objects() {
        let json: serde_json::Value = serde_json::from_str(&report().json().unwrap()).unwrap();
        let rows = json.as_array().unwrap();
        assert_eq!(rows.len(), QUANTILES.len() + 1);
        for row in rows {
            let row = row.as_object().unwrap();
            let mut keys: Vec<_> = row.keys().map(String::as_str).collect();
            keys.sort_unstable();
            assert_eq!(keys, ["floor", "name", "ours", "ratio", "reach", "unit"]);
            assert!(row["ours"].is_f64());
        }
        assert_eq!(rows[0]["name"], "a < b: p50");
        assert_eq!(rows[0]["ours"], 3.0);
        assert_eq!(rows[0]["floor"], 2.0);
        assert_eq!(rows[0]["ratio"], 1.5);
        assert_eq!(rows[0]["reach"], "1.6 × floor");
        assert!(rows[3]["floor"].is_null() && rows[3]["ratio"].is_null());
    }

    #[test]
    fn the_page_needs_nothing_else_and_says_what_the_rows_say() {
        let html = report().html();
        assert!(html.contains("a &lt; b: p99"));
        assert!(html.contains("<svg") && html.contains("<path"));
        for foreign in ["http", "src=", "<script", "NaN", "inf"] {
            assert!(!html.contains(foreign), "{foreign}");
        }
    }

    #[test]
    fn figures_have_three_digits_or_more() {
        let texts = [0.0, 1.23456, 45.678, 99.95, 1234.5].map(figure);
        assert_eq!(texts, ["0", "1.235", "45.7", "100.0", "1234"]);
    }
}
