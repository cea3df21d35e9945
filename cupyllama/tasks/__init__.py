"""Multiple-choice questions: where they are read from, and how they become token rows."""
