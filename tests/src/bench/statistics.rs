//! Paired comparison: ratios are formed within a round, where the machine was the same for both sides.

use serde::Serialize;

/// One metric, mesh against no mesh.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Comparison {
    pub(super) name: &'static str,
    pub(super) unit: &'static str,
    /// Median without the mesh.
    pub(super) plain: f64,
    /// Median with it.
    pub(super) mesh: f64,
    /// Median of the rounds' ratios, mesh / plain.
    pub(super) ratio: f64,
    pub(super) lowest: f64,
    pub(super) highest: f64,
}

impl Comparison {
    /// From one (plain, mesh) pair for each round.
    pub(super) fn new(name: &'static str, unit: &'static str, pairs: &[(f64, f64)]) -> Self {
        let sorted = |values: Vec<f64>| {
            let mut values = values;
            values.sort_by(f64::total_cmp);
            values
        };
        let ratios = sorted(pairs.iter().map(|(plain, mesh)| mesh / plain).collect());
        Self {
            name,
            unit,
            plain: median(&sorted(pairs.iter().map(|pair| pair.0).collect())),
            mesh: median(&sorted(pairs.iter().map(|pair| pair.1).collect())),
            ratio: median(&ratios),
            lowest: ratios.first().copied().unwrap_or(f64::NAN),
            highest: ratios.last().copied().unwrap_or(f64::NAN),
        }
    }
}

fn median(sorted: &[f64]) -> f64 {
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[length / 2],
        length => f64::midpoint(sorted[length / 2 - 1], sorted[length / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::Comparison;

    #[test]
    fn ratios_are_formed_within_a_round() {
        // The second round ran on a machine half as fast: the ratio is the same.
        let comparison = Comparison::new("x", "y", &[(10.0, 5.0), (5.0, 2.5), (8.0, 6.0)]);
        assert_eq!((comparison.ratio, comparison.lowest, comparison.highest), (0.5, 0.5, 0.75));
        assert_eq!((comparison.plain, comparison.mesh), (8.0, 5.0));
    }
}
