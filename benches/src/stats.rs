//! Medians, and how far measurements lie apart.

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The middle value; 0 where there are none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    sorted(values).get(values.len() / 2).copied().unwrap_or(0.0)
}

/// How far the middle half spreads, as a share of the median; 0 where there is none.
#[must_use]
pub fn spread(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    let (low, high) = (values.len() / 4, values.len() * 3 / 4);
    match (sorted.get(low), sorted.get(high), median(values)) {
        (Some(low), Some(high), middle) if middle != 0.0 => (high - low) / middle,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outlier_moves_neither() {
        let values = [5.0, 1.0, 3.0, 2.0, 4_000.0];
        assert_eq!(median(&values).to_bits(), 3.0f64.to_bits());
        assert_eq!(spread(&values).to_bits(), 1.0f64.to_bits());
        assert_eq!((median(&[]).to_bits(), spread(&[]).to_bits()), (0, 0));
    }
}
