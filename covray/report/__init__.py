"""Reports: contact sheets, pages and descriptions of what the commands made."""
