"""Solvers: how weights become codes once a fit has given the scales. One file each, found by registration."""
