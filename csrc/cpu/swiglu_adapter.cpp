namespace mmadapt {}
