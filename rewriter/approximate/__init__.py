"""Which methods are installed where: errors measured on the user's data, what is learned, the cheapest within the budget."""
