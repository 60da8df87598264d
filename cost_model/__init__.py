"""Cascade + mapping + device → seconds, bytes, and why; the plan as plain data."""
