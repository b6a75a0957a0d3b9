"""What each role of the loop must do, and the roles as shipped."""
