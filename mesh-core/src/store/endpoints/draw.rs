//! Draws in proportion to weights, each draw in O(1): Walker's alias method, as Vose builds it.

/// One in `WHOLE` of a column's chance.
const WHOLE: u128 = 1 << 32;

/// Weights, prepared.
#[derive(Debug)]
pub(super) struct Draw {
    columns: Box<[Column]>,
}

/// A column is chosen as often as any other; it stands for itself up to `keep`, beyond for `other`.
#[derive(Clone, Copy, Debug)]
struct Column {
    keep: u64,
    other: usize,
}

impl Draw {
    /// None where all weights are equal: then no preparation is needed. Zero is a weight like others.
    pub(super) fn prepare(weights: &[u32]) -> Option<Self> {
        let first = weights.first()?;
        let total: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
        if total == 0 || weights.iter().all(|weight| weight == first) {
            return None;
        }
        let count = weights.len();
        // What each has, where `total` is the share of one column.
        let mut has: Vec<u128> = weights.iter().map(|weight| u128::from(*weight) * count as u128).collect();
        let mut columns: Vec<Column> = (0..count).map(|other| Column { keep: WHOLE as u64, other }).collect();
        let (mut poor, mut rich): (Vec<usize>, Vec<usize>) = (0..count).partition(|i| has[*i] < total);
        while let (Some(small), Some(large)) = (poor.pop(), rich.pop()) {
            columns[small] = Column { keep: (has[small] * WHOLE / total) as u64, other: large };
            has[large] -= total - has[small];
            if has[large] < total { poor.push(large) } else { rich.push(large) }
        }
        Some(Self { columns: columns.into() })
    }

    /// An index; `random` is any number, each value of it as good as another.
    pub(super) fn draw(&self, random: u64) -> usize {
        let count = self.columns.len() as u64;
        let index = (random % count) as usize;
        let Column { keep, other } = self.columns[index];
        // What is left of the number is as random as it was.
        let coin = (random / count) % WHOLE as u64;
        if coin < keep { index } else { other }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often each is drawn, over numbers that are spread evenly.
    fn frequencies(weights: &[u32], draws: u64) -> Vec<f64> {
        let draw = Draw::prepare(weights).unwrap();
        let mut counts = vec![0_u32; weights.len()];
        for i in 0..draws {
            // Weyl's sequence: equidistributed, and the same in every run.
            counts[draw.draw(i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 8)] += 1;
        }
        counts.into_iter().map(|count| f64::from(count) / draws as f64).collect()
    }

    #[test]
    fn draws_in_proportion() {
        for weights in [
            &[1, 3][..],
            &[5, 1, 1, 1],
            &[0, 2, 1],
            &[1000, 1, 1, 1, 1],
            &[u32::MAX, 1],
            &[7, 11, 13, 17, 19, 23, 29],
        ] {
            let total: f64 = weights.iter().map(|weight| f64::from(*weight)).sum();
            for (weight, seen) in weights.iter().zip(frequencies(weights, 200_000)) {
                let expected = f64::from(*weight) / total;
                assert!(
                    (seen - expected).abs() < 0.005,
                    "{weights:?}: {weight} is drawn {seen}, not {expected}"
                );
            }
        }
    }

    #[test]
    fn what_weighs_nothing_is_never_drawn() {
        assert_eq!(frequencies(&[0, 1, 0, 2, 0], 100_000).into_iter().step_by(2).sum::<f64>(), 0.0);
    }

    #[test]
    fn equal_weights_need_nothing() {
        assert!(Draw::prepare(&[]).is_none());
        assert!(Draw::prepare(&[4, 4, 4]).is_none());
        assert!(Draw::prepare(&[0, 0]).is_none());
    }
}
