//! Medians, and how far measurements lie apart.

/// The value at a share of 0 to 1 of the sorted values; 0 where there are none.
#[must_use]
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    let at = (last as f64 * share.clamp(0.0, 1.0)).round() as usize;
    sorted.get(at).copied().unwrap_or(0.0)
}

/// The middle value.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// How far the middle half spreads, as a share of the median.
#[must_use]
pub fn spread(values: &[f64]) -> f64 {
    let middle = median(values);
    if middle == 0.0 {
        return 0.0;
    }
    (quantile(values, 0.75) - quantile(values, 0.25)) / middle
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outlier_moves_neither() {
        let values = [5.0, 1.0, 3.0, 2.0, 4_000.0];
        assert_eq!(median(&values), 3.0);
        assert_eq!(spread(&values), 1.0);
        assert_eq!((median(&[]), spread(&[])), (0.0, 0.0));
    }
}
