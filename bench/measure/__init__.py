"""How a call is timed, how its memory is counted, and the settings that make both comparable."""
