-- Which database of which server this is: physical standbys are the same, copies are not.
select (select s.system_identifier::text || '/' || d.oid from pg_control_system() s, pg_database d
         where d.datname = current_database())
