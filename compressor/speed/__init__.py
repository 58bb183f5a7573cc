"""What ``compress bench`` shows: tables, drawings and a page of measured speeds."""
