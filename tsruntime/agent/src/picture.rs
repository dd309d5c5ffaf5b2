//! Tokens a second per user against tokens a second per device, a line a server, as SVG.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::AgentError;
use crate::report::{Level, Report};

const SIZE: (u32, u32) = (900, 560);
const HEADROOM: f64 = 1.12;

/// The trade-off: to the right each user is served faster, upwards the device does more. A point is a run, named by its concurrency.
pub fn draw(reports: &[&Report]) -> Result<String, AgentError> {
    let mut svg = String::new();
    paint(&mut svg, reports).map_err(|error| AgentError::Failed(format!("the picture: {error}")))?;
    Ok(svg)
}

fn paint(svg: &mut String, reports: &[&Report]) -> Result<(), Box<dyn std::error::Error>> {
    let most = |of: fn(&Level) -> f64| {
        let all = reports.iter().flat_map(|report| &report.levels).map(of);
        all.fold(0.0, f64::max).max(1.0) * HEADROOM
    };
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .caption("Agents: speed for each user, and for the device", ("sans-serif", 18))
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..most(|level| level.tokens_per_s_user), 0.0..most(|level| level.tokens_per_s_device))?;
    chart
        .configure_mesh()
        .x_desc("tokens/s per user (median)")
        .y_desc("tokens/s per device")
        .light_line_style(WHITE)
        .draw()?;
    for (index, report) in reports.iter().enumerate() {
        let color = Palette99::pick(index).to_rgba();
        let points = || report.levels.iter().map(|level| (level.tokens_per_s_user, level.tokens_per_s_device));
        chart
            .draw_series(LineSeries::new(points(), color.stroke_width(2)))?
            .label(report.name.clone())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        chart.draw_series(points().map(|point| Circle::new(point, 4, color.filled())))?;
        let style = ("sans-serif", 13).into_font().color(&color).pos(Pos::new(HPos::Left, VPos::Bottom));
        chart.draw_series(report.levels.iter().map(|level| {
            let place = (level.tokens_per_s_user, level.tokens_per_s_device);
            EmptyElement::at(place) + Text::new(level.concurrency.to_string(), (6, -4), style.clone())
        }))?;
    }
    chart.configure_series_labels().border_style(BLACK.mix(0.3)).background_style(WHITE).draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report(name: &str, points: &[(u32, f64, f64)]) -> Report {
        let levels = points.iter().map(|(concurrency, user, device)| {
            json!({"concurrency": concurrency, "turns": 1, "failed": 0, "wall_s": 1, "tokens_per_s_user": user,
                   "first_token_ms": {"p50": 1, "p95": 1, "p99": 1}, "per_token_ms": {"p50": 1, "p95": 1, "p99": 1},
                   "tokens_per_s_total": device, "tokens_per_s_device": device, "prompt_tokens": 1, "output_tokens": 1,
                   "prefix_hit_rate": null, "failure": null})
        });
        let all = json!({"name": name, "model": "m", "url": "u", "workload": {}, "levels": levels.collect::<Vec<_>>()});
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn every_server_has_a_line_and_every_run_a_point() {
        let (ours, theirs) =
            (report("ours", &[(1, 70.0, 70.0), (8, 40.0, 300.0)]), report("theirs", &[(1, 20.0, 20.0)]));
        let svg = draw(&[&ours, &theirs]).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert_eq!(svg.matches("<circle").count(), 3);
        for word in ["ours", "theirs", "tokens/s per user"] {
            assert!(svg.contains(word), "{word}");
        }
        assert!(draw(&[&report("nothing", &[(1, 0.0, 0.0)])]).is_ok());
    }
}
