"""The laboratory: small models that train on a CPU in minutes, tasks with known answers, and what approximations do."""
