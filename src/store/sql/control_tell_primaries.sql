-- Whoever listens to this control database looks at the newest primaries of the nodes, whatever the version of the
-- topology. It commits nothing, and so waits for no standby; for the server's lock only briefly, as a hint does.
select pg_notify('shardmq_topology', 'primaries'), set_config('lock_timeout', '200ms', true)
