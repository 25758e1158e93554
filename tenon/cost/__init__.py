"""What things cost: devices, work, and the seconds one takes on the other."""
