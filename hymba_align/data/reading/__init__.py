"""From files to examples: sources of rows, their schemas, and a converter of the user's own."""
