"""Many measured scans in, one row of answers a scan out, nothing lost. Not for one pattern (`xrdfast.prediction`)."""
