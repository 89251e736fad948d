"""What a run leaves to look at: one page of HTML, the same as pictures; and which experts take which tokens."""
