"""Closed forms to test against."""
