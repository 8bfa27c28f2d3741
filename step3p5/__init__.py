"""Step-3.5-Flash for MAX."""
