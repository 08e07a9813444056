"""From run folders to comparisons, figures, reports and model cards."""
