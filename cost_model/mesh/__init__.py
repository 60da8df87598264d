"""An attention spread over a mesh of devices: what each holds, computes and sends."""
