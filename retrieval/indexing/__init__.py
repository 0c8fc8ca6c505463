"""How an index comes to be and changes: parts of one that is being made, adding and removing images."""
