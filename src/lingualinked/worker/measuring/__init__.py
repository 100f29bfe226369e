"""What is measured of this worker: modules, links, power, vitals."""
