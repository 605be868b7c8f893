"""What a file is that nobody claims, and how near it comes: the doctor."""
