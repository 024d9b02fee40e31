-- The cluster's id, the server and database that this control database was last known to be, and which it is.
select c.id, c.server,
       (select s.system_identifier::text || '/' || d.oid from pg_control_system() s, pg_database d
         where d.datname = current_database())
  from shardmq_control.cluster c
