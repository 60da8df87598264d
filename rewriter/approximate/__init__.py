"""Which methods are installed where: their error measured on the user's data, the cheapest within the budget searched."""
