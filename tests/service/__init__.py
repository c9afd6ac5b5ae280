"""Tests of the service over both tiers."""
