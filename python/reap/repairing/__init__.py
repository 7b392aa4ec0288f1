"""What the removed experts did, given back as far as the kept ones can: an adapter over an untouched file."""
