"""One term of a cascade: its normal forms, the span of its values, the laws that hold for it."""
