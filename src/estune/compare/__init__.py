"""Methods side by side on the same ground: what is measured of them, and how sure one can be of a difference."""
