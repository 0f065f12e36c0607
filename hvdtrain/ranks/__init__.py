"""How ranks meet, hear of each other and end, beside whatever engine moves their tensors; no engine is named here."""
