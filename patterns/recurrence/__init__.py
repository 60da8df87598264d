"""What a recurrence is: a cascade with a carried state, and which law each state follows."""
