"""Engines that execute the graphs of a bundle."""
