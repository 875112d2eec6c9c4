0.0007254511409850633 : Mass of the planets (in mstar)
85.10957181517027 : Semi-major axes
0.6469446257413821 : Eccentricities
16.080261547227572 : Inclinaison (deg)
1 : is Inclinaison damping?
1 : planets feel Disk ?
1 : planets feel others ?
0 : Accretion onto planets ?
1.66 : Accretion parameter
0.001 : Maximum mass of the planet
0.4 : Smoothing
1.0 : Region excluded from torque calculation
