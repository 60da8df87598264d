"""Methods that treat the heads of one attention differently: which head gets what is found by a calibration."""
