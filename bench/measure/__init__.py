"""These files time a call and count its memory, and make the settings that both depend on equal."""
