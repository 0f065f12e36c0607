"""Tests that run whole on every rank."""
