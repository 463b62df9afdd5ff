"""Tests of the product, a file for each promise-keeper; doubles of the world outside."""
