"""One attention → its candidates, and the decision of the policy among them."""
