"""Rank studies: from gradient norms to rank plans, arms, statistics and a report."""
