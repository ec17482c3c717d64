"""What survives: many seeded faults and mutants, of which each one can be made again from its seed and its number."""
