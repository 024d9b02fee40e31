-- Which primary this is: the server's system identifier and the timeline, which is null on a standby.
select (select s.system_identifier from pg_control_system() s),
       case when not pg_is_in_recovery() then
           ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::bigint end
