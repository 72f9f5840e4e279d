"""What a run will hold in memory, known before anything is loaded."""
